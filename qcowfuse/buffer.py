"""What bytes are passed around in."""

Buffer = bytes | bytearray | memoryview
