"""What a server does, in numbers.

``front`` counts what passes through this process, ``samples`` names every metric
and where its value comes from, ``prometheus`` shows them at SGLang's ``/metrics``.
"""
