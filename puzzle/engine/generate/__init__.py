"""Responses: the decode ring, cached passes, sampling."""
