"""Tars: read strictly, written durably."""
