"""Of the pictures and clips in these tests."""

HEIGHT, WIDTH, FRAMES = 32, 48, 21
