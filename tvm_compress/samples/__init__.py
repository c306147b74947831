"""The networks and data that ship with the tool."""
