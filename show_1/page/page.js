// What the page does in the browser itself. The address says which job it shows: ?job=…

// Gradio's first loader goes on asking for frames when it is gone, sixty a second while the page is open (6.31): a
// fifteenth of a core (measured), which is the models' own where browser and server share one. Ten will do here.
window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 100);
window.cancelAnimationFrame = clearTimeout;

const show1 = {
    job: () => new URLSearchParams(location.search).get('job') || '',

    goTo(job) {
        if (!job) return;
        history.pushState(null, '', '?job=' + job);
        document.querySelector('#screen').scrollIntoView({ behavior: 'smooth', block: 'nearest' });
    },

    async askToNotify() {
        const allowed = !window.Notification || await Notification.requestPermission() === 'granted';
        if (allowed && !show1.notify('This is how it will look.'))
            alert('This browser shows no notifications here; the tab will tell.');
    },

    // Whether the browser shows it: Chrome on Android has notifications, but not for pages.
    notify(body) {
        try {
            return Boolean(new Notification('Show-1', { body }));
        } catch {
            return false;
        }
    },

    // The tab's title, and the browser's own notice where it is allowed: only for a job that this page saw at work.
    tell() {
        const status = document.querySelector('#status .status');
        if (!status) return;
        const { state, title } = status.dataset;
        if (title !== show1.title || document.title !== show1.titleThen) {  // the browser may change a title that is set
            document.title = show1.title = title;
            show1.titleThen = document.title;
        }
        const worked = ['running', 'waiting'].includes(show1.state) && show1.job() === show1.told;
        if (worked && ['done', 'stopped', 'failed'].includes(state) && window.Notification?.permission === 'granted')
            show1.notify(status.querySelector('[role=status]').textContent + '\n' + title);
        show1.state = state;
        show1.told = show1.job();
    },

    copy(button) {
        const text = button.parentElement.querySelector('pre');
        getSelection().selectAllChildren(text);
        const copied = navigator.clipboard?.writeText(text.textContent) ?? Promise.resolve(document.execCommand('copy'));
        copied.then(() => { button.textContent = 'Copied'; }, () => { button.textContent = 'Press Ctrl+C'; });
    },

    type(prompt) {
        const box = document.querySelector('#prompt textarea');
        box.value = prompt;
        box.dispatchEvent(new Event('input', { bubbles: true }));
        box.focus();
    },
};

new MutationObserver(show1.tell).observe(document.documentElement, {
    subtree: true, childList: true, attributes: true, attributeFilter: ['data-title', 'data-state'],
});
document.addEventListener('click', event => {
    const { target } = event;
    const example = target.closest('[data-prompt]'), copy = target.closest('[data-copy]');
    const link = target.closest('#gallery a');
    if (example) show1.type(example.dataset.prompt);
    if (copy) show1.copy(copy);
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {  // into view without a new page
        event.preventDefault();
        history.pushState(null, '', link.getAttribute('href'));
        window.scrollTo({ top: 0, behavior: 'smooth' });
    }
});
// Clips and the gallery's videos play while they are pointed at.
document.addEventListener('mouseover', event => {
    event.target.closest?.('.clips video')?.play().catch(() => {});  // left again before it played
    const picture = event.target.closest?.('img[data-video]');
    if (!picture) return;
    const video = Object.assign(document.createElement('video'), {
        src: picture.dataset.video, muted: true, loop: true, autoplay: true, playsInline: true,
    });
    video.ariaHidden = 'true';
    picture.closest('.thumb').append(video);
});
document.addEventListener('mouseout', event => {
    event.target.closest?.('.clips video')?.pause();
    const thumb = event.target.closest?.('#gallery .thumb');
    if (thumb && !thumb.contains(event.relatedTarget)) thumb.querySelector('video')?.remove();
});
