"""Planning a recipe before anything is loaded: memory by term and phase, time, energy.

result.py    the plan, as plain data
devices.py   the table of GPUs, and measurements of this machine
trace.py     one training step on fake tensors: which memory is live when
step.py      building and tracing the recipe's own step
estimate.py  recipe and device → Plan
fit.py       recipe and budget → a recipe that fits
table.py     the plan in words and tables
rewrite.py   changing keys in a recipe's text, with its comments kept
command.py   `finetune plan`
"""
