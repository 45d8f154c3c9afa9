"""What all the evidence of a run says of each named feature: one row, one card, one sentence, and no claim without its control."""
