"""Weight sync: which snapshot may be loaded onto which (`chain`, pure), the endpoints (`hot_load`), and the syncer."""
