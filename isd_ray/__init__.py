"""ISD on Ray: self-supervised learning for unbalanced, unlabelled images."""
