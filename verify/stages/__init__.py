"""The stages of judgement, one a file: the nominal value, its enclosure, and the words of a finding.

A stage reads what the stage before it holds: the value that the kernel returned where it returned it, else the
enclosure. So errors do not add up, and the first stage that fails names the culprit.
"""
