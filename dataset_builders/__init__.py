"""From raw text to graded training data: sources -> corpus -> candidates -> scores -> mined -> hub."""
