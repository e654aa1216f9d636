"""The engines that write phase 2's continuations, and the processes they run in."""
