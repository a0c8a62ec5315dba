"""Tests of Fusecheck itself."""
