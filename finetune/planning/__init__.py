"""What a recipe will need, before anything of it is loaded: memory by term and phase, time, energy.

result.py    the answer, as plain data
devices.py   the table of GPUs, and this machine as it was measured
trace.py     one training step on tensors without numbers; what lives when
estimate.py  recipe and device → Plan
fit.py       recipe and budget → a recipe that fits
table.py     the answer in words and tables
rewrite.py   changed keys in a recipe's text, its comments kept
command.py   `finetune plan`
"""
