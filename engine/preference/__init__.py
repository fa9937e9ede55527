"""What is learnt from pairs of a chosen and a rejected answer: their losses, the reference model and the judgement of pairs."""
