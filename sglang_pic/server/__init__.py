"""The front of the server: HTTP requests in, internal link requests out.

``middleware`` reads ``pic`` fields and returns the report, ``chat`` carries
marks through the chat template, ``funnel`` compiles what is missing and sends
the link, ``routes`` serves ``/pic/*``.
"""
