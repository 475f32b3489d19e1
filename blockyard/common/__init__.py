"""What both services share: protocol constants, channel options, logging, settings base."""
