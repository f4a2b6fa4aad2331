"""A trained encoder beside a frozen decoder (COMB): its modules in plain torch.

config   what it was trained for, and its sizes
encoder  documents to keys and values, with no position in a prompt
cross    the block through which the decoder looks at them
weights  both as files beside a model
"""
