"""The decoders: one interface, a module and a readable reference implementation for each kind, and the model folder."""
