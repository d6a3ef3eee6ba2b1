"""Saliency maps: which pixels a model's answer rests on, and whether these lie on the object."""
