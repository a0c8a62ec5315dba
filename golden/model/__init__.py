"""The golden model: a small real Llama, trained for Fusecheck, so that the accuracy question runs without a download.

`world`, `questions` and `stories` generate the tasks from a seed; `corpus` makes training text of them; `network`,
`train` and `export` make the FP8 checkpoint that lies beside this file. All but `train` run without a GPU.
"""
