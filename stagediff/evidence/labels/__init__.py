"""What a labeller says of features, blind: are the found ones related to the topics in question more often than random ones (P1; method.md, section 2)?"""
