"""The parts of scripts/bench. Only ratios of figures that were measured in turn, in one run, mean anything."""
