"""`python -m pilaf_ray`."""

from pilaf_ray.cli import main

if __name__ == "__main__":
    main()
