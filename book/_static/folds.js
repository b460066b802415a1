// Folds: a link to something in one opens it, and on paper they are open.
(() => {
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = target?.closest("details.samlib-fold");
    if (!fold) return;
    fold.open = true;
    target.scrollIntoView();
  };
  let closed = [];
  addEventListener("DOMContentLoaded", reveal);
  addEventListener("hashchange", reveal);
  addEventListener("beforeprint", () => {
    // In the whole book a claim stands on its chapter's page and on that of all claims: there, the last, it is opened.
    const folds = [...document.querySelectorAll("details.samlib-fold:not([open])")];
    closed = [...new Map(folds.map(fold => [fold.querySelector("h3")?.id ?? fold, fold])).values()];
    closed.forEach(fold => (fold.open = true));
  });
  addEventListener("afterprint", () => closed.forEach(fold => (fold.open = false)));
})();
