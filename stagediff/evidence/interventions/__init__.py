"""What a feature does when it is put in or taken out: steering along decoder directions, and clamping features with the SAE's error term kept."""
