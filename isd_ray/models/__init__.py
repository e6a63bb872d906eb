"""Networks: backbones, heads and the teacher."""
