"""Were the runs well tuned, and what rule for learning rate and batch do they give?"""
