"""People rate the answers of several models without knowing whose they are (Figure 6 of the paper)."""
