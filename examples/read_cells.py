"""Counts, areas and densities per type from a run: python read_cells.py wsiseg-out/slide/cells.parquet"""

import json
import sys

import geopandas
import pyarrow.parquet as pq
import shapely

path = sys.argv[1]
cells = geopandas.read_parquet(path)
wsiseg = json.loads(pq.read_schema(path).metadata[b"wsiseg"])  # slide, mpp, bounds, colours, ...

# The area that the cells span, as a convex hull; for densities per region, clip the cells to its polygon instead.
hull = shapely.convex_hull(shapely.multipoints(cells[["x", "y"]].to_numpy()))
area_mm2 = hull.area * wsiseg["mpp"] ** 2 / 1e6

table = cells.groupby("cell_type", observed=True).agg(cells=("id", "size"), median_area_um2=("area_um2", "median"))
if area_mm2:
    table["per_mm2"] = table["cells"] / area_mm2
print(f"{wsiseg['slide']}: {len(cells)} cells on {area_mm2:.3f} mm2")
print(table.round(1).to_string())
