"""An adapter for linked requests: a LoRA that learns to answer as full recompute does.

data      what it learns from: prompts of segments
lora      low-rank changes of a model's linear layers, and their file
linked    the linked forward, differentiable: compile alone, in company, link
learning  one step's loss; the run, its checkpoints and its curve
"""
