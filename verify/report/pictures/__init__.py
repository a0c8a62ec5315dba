"""The geometry of the report's pictures, from numbers in `result.json`; the templates draw them.

Places across are in percent of a picture's width, so that text keeps its size on a phone; heights are in pixels.
"""
