"""What is drawn, before any ink: pictures as data, the looks they name, and the two pens that draw them."""
