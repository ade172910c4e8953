"""What is drawn, before any ink: pictures as data, and the two pens that draw them on the page and on paper."""
