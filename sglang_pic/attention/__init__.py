"""Attention over spans.

``step`` turns the plans of one batch into ragged arrays, once a forward pass;
``rope`` finds each layer's rotary table and refuses what is not position-linear;
one file per backend runs the arrays, once a layer.
"""
