"""Static evidence: what compilers and assemblers say about every kernel on every architecture, without running it."""
