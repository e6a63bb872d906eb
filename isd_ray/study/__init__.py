"""Studies: methods compared over data sets, imbalances, splits and seeds, and the report of it."""
