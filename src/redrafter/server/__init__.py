"""OpenAI-compatible HTTP over one engine: ``app.build`` makes the ASGI application, ``run.serve`` runs it.

One thread owns the engine and the device (``worker``); the event loop owns requests, text and sockets. Data flows
body -> schema -> prompt ids -> worker -> events -> text -> JSON or server-sent events.
"""
