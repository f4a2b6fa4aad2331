"""A trained encoder beside a frozen decoder (COMB): its modules in plain torch, and their
place beside a model that SGLang serves.

config   what it was trained for, and its sizes
encoder  documents to keys and values, with no position in a prompt
cross    the block through which the decoder looks at them
weights  both as files beside a model
ranks    both over tensor-parallel ranks
beside   both beside SGLang's model; models/ has its classes with them
step     which tokens of a batch see which documents
rows     which requests see which, and so which rows of the batch that runs next
limits   how much is encoded at once
"""
