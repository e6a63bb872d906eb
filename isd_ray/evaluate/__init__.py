"""Evaluation of frozen features: kNN, linear, groups of classes, collapse."""
