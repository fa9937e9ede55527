"""Predict the memory that training takes on a card, tensor by tensor, without torch."""
