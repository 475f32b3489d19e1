"""Running all of Blockyard on one machine: child processes, started, watched and stopped."""
