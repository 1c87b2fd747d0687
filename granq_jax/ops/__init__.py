"""Operations in the form that a platform runs fastest, each equal to the plain one."""
