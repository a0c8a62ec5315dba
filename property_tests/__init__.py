"""What users run (kernel, graph, accuracy), and the tests of Fusecheck itself (suite)."""
