"""The part that needs nothing but torch: additions, layer types, targets, attaching, quantising, merging, saving."""
