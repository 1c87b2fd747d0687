"""The method: losses, objectives, the joint step of generator and student, the loop, the guard."""
