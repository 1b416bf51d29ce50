"""``mico-chat doctor``: what the machine has, what works, what a model needs here.

It looks and never changes, fetches or loads a model. What may crash or hang, such as a library that
was compiled for another processor, is tried in processes of its own (:mod:`.probe`).
"""
