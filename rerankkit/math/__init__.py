"""Pure functions: metrics, statistics, advantages, losses. Imports nothing of ours; import the module you need."""
