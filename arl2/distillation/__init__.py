"""Turning a softmax model into a hybrid one: the objectives of the two stages."""
