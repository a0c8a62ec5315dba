"""The graph question: does a rewrite put the fused collective where it belongs, and nowhere else?

`ops` are the operators, `passes` the two transforms, `plan` and `rows` the graphs with their
predicted outcomes, `checks` what a rewritten graph is held to. `command` is `fusecheck graph`.
"""
