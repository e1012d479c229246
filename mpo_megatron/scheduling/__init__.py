"""Groups to rows: where tokens lie (`layout`), which groups share a row (`plan`), and the row's tensors (`pack`)."""
