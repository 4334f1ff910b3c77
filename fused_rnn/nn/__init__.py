"""The face of torch.nn: modules, their functions, what they check, and what converts to them."""
