"""The networks: the contract in `segmenter`, one file for each architecture, `build` names them."""
