"""Several processes that train one model: who they are, what they exchange, and what each of them owns.

Everything is exchanged by `torch.distributed`; nothing here opens a connection of its own.
"""
